"""Which of the trained map's losses does the work?"""
