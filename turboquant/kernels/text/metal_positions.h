const uint index_in_group = thread_index_in_threadgroup;
const uint3 group = threadgroup_position_in_grid;
