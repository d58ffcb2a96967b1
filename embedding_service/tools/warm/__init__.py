"""`embedding-warm`: sends the texts of a file through the service, so that its caches know them."""
