//! Guest images and container disks: file trees become read-only images.
//!
//! Everything here is reproducible: the same tree gives the same bytes, whenever, wherever and
//! by whomever it is built. Start with [`guest`], the recipe of the image that every virtual
//! machine boots; it describes a [`tree::Tree`], which [`erofs`] and [`cpio`] turn into the two
//! forms that a kernel accepts as its root.

pub mod guest;
pub mod tree;

pub mod cpio;
pub mod erofs;
