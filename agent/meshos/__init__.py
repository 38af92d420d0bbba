"""The behaviour engine of a node, pure: events → state → reconcile → actions → snapshot."""
