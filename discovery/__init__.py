"""Who is out there, in what state, and how to reach them."""
