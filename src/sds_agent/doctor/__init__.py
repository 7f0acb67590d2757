"""What is wrong with an agent, its surroundings and its Envoys, and the way out: from facts that were gathered before.
"""
