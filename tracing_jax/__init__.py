"""Were two language models trained independently, or does one descend from the other?"""
