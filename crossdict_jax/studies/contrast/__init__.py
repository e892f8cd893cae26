"""Which features does a preference between two sentences rest on, and do they carry over?"""
