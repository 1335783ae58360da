"""Many pictures, from a file of prompts: each follows from its line alone, on however many processes they are drawn."""
