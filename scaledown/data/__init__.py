"""From questions and passages to the project's records."""
