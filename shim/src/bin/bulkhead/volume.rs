//! `bulkhead volume`: named volumes, which outlive their containers.

use shim::image::volume::Volumes;

use super::{
    cli::{VolumeArgs, VolumeCommand},
    say::say,
};

/// Carries a command about them out.
pub(crate) fn volume(args: &VolumeArgs) -> anyhow::Result<u8> {
    let volumes = Volumes::new(&args.root.volume_root);
    match &args.command {
        VolumeCommand::Create { names } => {
            for name in names {
                volumes.create(name)?;
                say(name)?;
            }
        }
        VolumeCommand::List => {
            for name in volumes.names()? {
                say(format_args!("{name}\t{}", volumes.data(&name).display()))?;
            }
        }
        VolumeCommand::Remove { names } => {
            for name in names {
                volumes.remove(name)?;
                say(name)?;
            }
        }
    }
    Ok(0)
}
