"""Clients of the running service, installed as commands.

The rest of the package never imports them, and they import nothing of it.
"""
