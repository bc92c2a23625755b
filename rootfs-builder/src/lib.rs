//! Guest images and container disks: file trees become read-only EROFS images.
