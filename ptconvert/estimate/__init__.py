"""What a schedule buys on hardware that isn't here: a roofline per stage, a cost per all-reduce."""
