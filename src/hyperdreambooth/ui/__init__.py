"""The page: the whole method in a browser, for who opens no terminal."""
