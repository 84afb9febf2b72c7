"""One module per data set, which lists the cases in its layout on disk and defines its labels and regions."""
