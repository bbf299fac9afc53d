"""A page in the browser that shows what compression does to an answer, its cost, and the ranking of its passages."""
