"""Operations on tensors that methods share: tasks, inner loops, norms, prototypes, solvers, measures. None knows a method."""
