"""`embedding-validate`: checks a running system against its targets."""
