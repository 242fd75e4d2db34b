"""The one file that names devices. No torch at import: the options of commands name devices too."""

CPU = "cpu"
