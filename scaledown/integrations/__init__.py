"""Components for the frameworks that retrieval-augmented generation is written in; one file each."""
