#[hopline::service]
trait Demo {
    async fn put(&self, other: Self, all: Vec<Self>, one: Self::Item);
}

fn main() {}
