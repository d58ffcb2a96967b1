# Sourced by up, test and check. Sets `root` and `venv`. `need NAME...` makes `$venv/bin/python` able to run the project;
# a NAME is an extra of pyproject.toml, or one of its dependency groups with a + in front (+test).
# shellcheck shell=bash
# `CDPATH=`: an exported CDPATH would lead `cd scripts/..` into another folder, and make it print the name
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
install_log=$root/.local/install.log
# torch is installed before everything else: a package that depends on torch would accept a build that brings several GB
# of CUDA. Where pip's own index offers only that build, TORCH_INDEX_URL names PyTorch's index of CPU builds.
torch=torch==2.13.0
is_new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# Installs the project with these extras and groups, unless the same was installed from the same pyproject.toml before.
need() {
  mkdir -p "$root/.local"
  # The lock allows one installation at a time. flock comes with util-linux; systems without it go unlocked.
  if command -v flock >/dev/null; then exec 9>"$root/.local/install.lock" && flock 9; fi
  installed "$@" || install "$@"
  exec 9>&-
}

installed() {
  local extra
  [[ -x $venv/bin/python ]] || return 1
  for extra; do cmp -s "$root/pyproject.toml" "$venv/installed-$extra.toml" || return 1; done
}

install() {
  local extra extras=() groups=() requirements=() wanted python began=$SECONDS
  : >"$install_log"
  if ! "$venv/bin/python" -c "import pip; $is_new_enough" 2>/dev/null; then
    python=$(find_python) || exit 1
    say "making .venv with $("$python" --version)"
    rm -rf "$venv"
    "$python" -m venv "$venv" >>"$install_log" 2>&1 || failed "cannot make .venv (Debian: apt-get install python3-venv)"
  fi
  say "installing $torch${TORCH_INDEX_URL:+ from TORCH_INDEX_URL}; the first time this takes minutes"
  quiet_pip "$torch" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
  for extra; do case $extra in +*) groups+=("${extra#+}") ;; *) extras+=("$extra") ;; esac; done
  say "installing the project with ${extras[*]} ${groups[*]}"
  wanted=$(requirements_of "${groups[@]}") || failed "cannot read the dependency groups of pyproject.toml"
  [[ -z $wanted ]] || mapfile -t requirements <<<"$wanted"
  quiet_pip --editable "$root[$(IFS=,; echo "${extras[*]}")]" "${requirements[@]}"
  for extra; do cp "$root/pyproject.toml" "$venv/installed-$extra.toml"; done
  say "installed after $((SECONDS - began)) s"
}

# Prints the requirements of dependency groups, one a line, those of included groups too. `pip install --group` does the
# same since pip 25.1, but a new environment has the pip that its Python came with, which may be older.
requirements_of() {
  "$venv/bin/python" - "$root/pyproject.toml" "$@" <<'PY'
import sys, tomllib

groups = tomllib.load(open(sys.argv[1], "rb"))["dependency-groups"]
def show(name):
    for entry in groups[name]:
        show(entry["include-group"]) if isinstance(entry, dict) else print(entry)

for name in sys.argv[2:]:
    show(name)
PY
}

# Prints the path of PYTHON if that is set, else of the first Python that is new enough. The user's own choice (python3)
# comes before any other.
find_python() {
  local candidate candidates=(python3 python python3.14 python3.13 python3.12 python3.11)
  [[ -z ${PYTHON-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c "$is_new_enough" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "needs Python 3.11 or newer${PYTHON:+, and PYTHON=$PYTHON is not}; install it, or set PYTHON to its command"
}

# Runs pip install. Its output goes to the log; the terminal shows only the steps that take time.
quiet_pip() {
  "$venv/bin/python" -m pip install --no-input --progress-bar off "$@" 2>&1 </dev/null |
    tee -a "$install_log" |
    awk '/^ *(Downloading|Using cached) .*[MG]B\)$/ { n = split($2 == "cached" ? $3 : $2, path, "/"); print "    " path[n], $(NF - 1), $NF; fflush() }
         /Downloading .*nvidia/ && !told++ { print "    (CUDA libraries: several GB; to do without, name a CPU index in TORCH_INDEX_URL)"; fflush() }
         /^Installing collected packages/ { print "    unpacking " NF - 3 " packages"; fflush() }' >&2 ||
    failed "pip install $1 failed"
}

failed() {
  tail -n 30 "$install_log" >&2
  die "$*; the whole log is in $install_log"
}
