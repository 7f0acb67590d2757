"""What is wrong with an agent, its surroundings and its Envoys, and the way out, judged by facts gathered before."""
