"""Widgets: they know lines, rows and keys, never sockets."""
