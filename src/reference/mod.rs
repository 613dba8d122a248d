//! The plain Rust backend: oracle of every test and the backend where there is no GPU.
