"""Does a picture show the person, and what the prompt asks for? Scored by models that no training uses."""
