"""How many paired rows is a map worth?"""
