"""Bring a captured graph into the form that the other passes expect; every pass here keeps all bits."""
