"""Methods of unlearning without an SAE, to compare with; each has a `name` and `settings(material, seed)`, one file each."""
