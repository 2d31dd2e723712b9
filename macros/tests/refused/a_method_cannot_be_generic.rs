#[hopline::service]
trait Demo {
    async fn put<'a, T, const N: usize>(&self, value: u8);
}

fn main() {}
