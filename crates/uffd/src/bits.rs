//! Sets of named bits, as the interface has several: each is a `u64` with names, in which bits that
//! this crate does not know are carried along, so that a newer kernel is never an error.

/// Declares a set of bits: the type, a constant for each bit, its names, and `|`, `&`.
macro_rules! bits {
    ($(#[$doc:meta])* $type:ident { $($(#[$bit_doc:meta])* $name:ident = $bit:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $type(pub u64);

        impl $type {
            $($(#[$bit_doc])* pub const $name: $type = $type(1 << $bit);)*
            /// Nothing.
            pub const NONE: $type = $type(0);
            const NAMES: &'static [(&'static str, u32)] = &[$((stringify!($name), $bit)),*];

            /// Whether all bits of `other` are in this set.
            pub const fn contains(self, other: $type) -> bool {
                self.0 & other.0 == other.0
            }

            /// The bits of this set that `other` lacks.
            pub const fn without(self, other: $type) -> $type {
                $type(self.0 & !other.0)
            }

            /// Names of the known bits, then `bit N` for the others, lowest bit first.
            pub fn names(self) -> Vec<String> {
                (0..64)
                    .filter(|bit| self.0 >> bit & 1 == 1)
                    .map(|bit| match Self::NAMES.iter().find(|(_, known)| *known == bit) {
                        Some((name, _)) => (*name).to_owned(),
                        None => format!("bit {bit}"),
                    })
                    .collect()
            }

            /// The set of one bit with this name.
            pub fn named(name: &str) -> Option<$type> {
                let (_, bit) = Self::NAMES.iter().find(|(known, _)| *known == name)?;
                Some($type(1 << bit))
            }
        }

        impl std::ops::BitOr for $type {
            type Output = $type;
            fn bitor(self, other: $type) -> $type {
                $type(self.0 | other.0)
            }
        }

        impl std::ops::BitAnd for $type {
            type Output = $type;
            fn bitand(self, other: $type) -> $type {
                $type(self.0 & other.0)
            }
        }

        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({})", stringify!($type), self.names().join(" | "))
            }
        }
    };
}
pub(crate) use bits;
