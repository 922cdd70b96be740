"""What the routes do, one file for each word of the product. Which routes there are, `routes_table.py` says."""
