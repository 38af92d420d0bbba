"""The fleet as an operator wants it: daemons, chains and artifacts of one mesh, read from a file and placed."""
