//! Settings of a project, and the readers of TOML and of templates.

pub mod key_table;
pub mod overrides;
pub mod project;
pub mod template;
pub mod toml_reader;
mod toml_syntax;
pub(crate) mod within;
