"""The report page of an evaluation and its pictures: maps, prototypes, parts, trees. No model runs here."""
