"""Operations that deserve a hand-written version per backend: a reference, the fast ones and one dispatch each."""
