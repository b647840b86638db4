"""Jobs on a cluster: submit one, and find out what a cluster lacks."""
