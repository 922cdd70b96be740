<?php

declare(strict_types=1);

namespace Durable\Worker;

/**
 * Nobody wants this step's answer any more: it was cancelled, or its task is another worker's by now.
 *
 * Thrown by `Step::heartbeat()` and `Step::sleep()`. An Error, so that `catch (\Exception)` in a handler does not swallow it.
 */
final class StepCancelled extends \Error
{
}
