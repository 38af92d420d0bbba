"""What the operator sees and touches: console and command line."""
