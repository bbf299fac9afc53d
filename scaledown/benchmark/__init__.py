"""Operations, time and memory of reading passages whole and compressed."""
