"""`pdq bench`: a load client, and what it reports."""
