//! Guest images and container disks: file trees become read-only images.
//!
//! Everything here is reproducible: the same tree gives the same bytes, whenever, wherever and
//! by whomever it is built. Two recipes use the rest:
//!
//! - [`guest`]: the image that every virtual machine boots. It describes a [`tree::Tree`], which
//!   [`erofs`] and [`cpio`] turn into the two forms that a kernel accepts as its root.
//! - [`image`]: a container image becomes one EROFS image. Each [`layer`] is applied to a
//!   [`filesystem::FileSystem`], which [`erofs`] writes.

pub mod guest;
pub mod tree;

pub mod image;
pub mod layer;

pub mod cpio;
pub mod digest;
pub mod erofs;
pub mod filesystem;

mod sys;
