//! Settings of a project, and how TOML and templates are read.

pub mod key_table;
pub mod overrides;
pub mod project;
pub mod template;
pub mod toml_reader;
