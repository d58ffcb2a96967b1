"""Requests to the gateway, and the command-line options that both tools have."""
