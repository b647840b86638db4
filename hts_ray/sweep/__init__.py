"""`hts sweep`: many settings tried over one teacher's pass, and the best of them."""
