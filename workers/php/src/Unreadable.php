<?php

declare(strict_types=1);

namespace Durable\Worker;

/** A message that is not what it should be; the text says why. */
final class Unreadable extends \RuntimeException
{
}
