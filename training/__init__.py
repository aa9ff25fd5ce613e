"""How the bundled models are made: corpus -> tokenizer -> token streams -> training -> model folders.

Purpose: everything needed to train the three bundled models again from a folder of plain text.
Doesn't know: the engine and the server; they see only the finished model folders.
Invariant: nothing here reads the test split except `training.evaluate`.
"""
