"""Published weights in and out: files, the tables of names, and the way onto the devices and
back."""
