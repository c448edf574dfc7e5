"""The bundled sample corpus: tables of facts and their generator."""
