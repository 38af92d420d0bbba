"""The daemons of a node: processes and in-process classes, carried out as the engine asks and reported as they are."""
