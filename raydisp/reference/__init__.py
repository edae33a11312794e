"""The generated parts of the documentation: fields of the study file, columns of the tables."""
