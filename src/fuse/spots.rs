//! Where what is watched is in the tree.

use crate::{
    notify::{Place, Spot},
    sandbox::SandboxId,
    tree::{DaemonFile, File, Node},
};

/// Returns the node of a spot.
pub(super) fn node(spot: Spot) -> Node {
    match spot {
        Spot::State(row) => Node::File(row, File::State),
        Spot::Events(row) => Node::File(row, File::Events),
        Spot::AllEvents => Node::Daemon(DaemonFile::Events),
        Spot::Gone(row) => Node::Dir(row),
    }
}

/// Returns the files of which pollers look again when a spot has changed. A boot begins a
/// console, and what was deleted has none.
pub(super) fn polled(spot: Spot) -> impl Iterator<Item = Node> {
    let console = match spot {
        Spot::State(row) => Some(Node::File(row, File::Console)),
        Spot::Events(_) | Spot::AllEvents | Spot::Gone(_) => None,
    };
    std::iter::once(node(spot)).chain(console)
}

/// Returns where a spot is, of the sandbox `id` if it is one of a sandbox.
pub(super) fn locate(spot: Spot, id: Option<&SandboxId>) -> Place {
    let node = node(spot);
    let dir = id.map(SandboxId::to_string).unwrap_or_default();
    let path = match node {
        Node::Root | Node::Dir(_) => dir,
        Node::Daemon(file) => file.name().to_owned(),
        Node::NetDir(_) => format!("{dir}/net"),
        Node::File(_, file) => format!("{dir}/{}", file.path()),
    };
    Place { path, inode: node.inode() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::RowId;

    #[test]
    fn a_spot_is_where_its_file_is() {
        let id = "web-1".parse().unwrap();
        for (spot, path, inode) in [
            (Spot::State(RowId(3)), "web-1/state", 193),
            (Spot::Events(RowId(3)), "web-1/events", 204),
            (Spot::AllEvents, "dozed.events", 4),
            (Spot::Gone(RowId(3)), "web-1", 192),
        ] {
            assert_eq!(locate(spot, Some(&id)), Place { path: path.to_owned(), inode });
        }
    }
}
