"""Many processes: layouts, the mesh, applying them to a model, planning, launching, health."""
