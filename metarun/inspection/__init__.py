"""A data set looked at before it is used: what it holds, what is wrong with it, which tasks fit, how long training would take."""
